"""From a model's name to its weights: architecture, files, the Hugging Face Hub, conversion, model cards."""
