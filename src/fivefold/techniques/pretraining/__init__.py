"""Pretraining stage: how weights come to be: distributed training, precision, data, objectives. One technique per file, none edited to add the next."""
