"""Models on disk: joining two bases, opening, importing and exporting grafts, adapters and bundled weights."""
