"""Finetuning stage: adapting weights: masks, adapters, full-parameter under limited memory. One technique per file, none edited to add the next."""
