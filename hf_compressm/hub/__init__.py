"""Models from and to the Hub: fetched and checked before they are loaded, checked before they are pushed."""

from .loading import fetch, load_model, model_class_of
from .push import push_folder

__all__ = ["fetch", "load_model", "model_class_of", "push_folder"]
