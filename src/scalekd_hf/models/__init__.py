"""Students and teachers, of timm and of transformers."""
