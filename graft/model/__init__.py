"""The model itself: it imports only torch and transformers, so that it also travels as remote code."""
