"""Parts of ``scripts/train_tiny_nsa.py``: text, model, training phases, measurements, export."""
