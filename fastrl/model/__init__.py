"""The decoder and everything around its weights: configuration, files, tokenizer, reward model, critic."""

from fastrl.model.adapter import load_model
from fastrl.model.decoder import Attend, Decoder, ModelConfig
from fastrl.model.language import LanguageModel, Tokenizer

__all__ = ["Attend", "Decoder", "LanguageModel", "ModelConfig", "Tokenizer", "load_model"]
