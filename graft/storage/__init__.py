"""Files wherever they lie: local folders, buckets, hubs and web servers are read here, and files are written whole."""
