"""Uploads are decoded into chunks of speech in processes that may crash without harm to the service."""
