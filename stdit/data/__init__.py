"""Video data: manifests, decoding, buckets, batches, and the embedded data set."""
