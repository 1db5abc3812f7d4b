"""Read files from local folders, buckets, hubs and web servers, and write files and folders whole."""
