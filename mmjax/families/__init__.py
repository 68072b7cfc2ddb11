"""The families of models. Each consists of an encoder, which turns a batch into embedded tokens, and a language model.

A family is one file that ends with its declaration; see `mmjax.families.base.Family`.
"""

from mmjax.families import imagebind_llm, llama, llama_adapter, minigpt4  # noqa: F401  they register themselves
from mmjax.families.base import FAMILIES, Family, config_from_dict, find, initial, register, shapes

__all__ = ["FAMILIES", "Family", "config_from_dict", "find", "initial", "register", "shapes"]
