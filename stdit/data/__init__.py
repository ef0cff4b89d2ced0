"""Video data: manifests, decoding, buckets, batches, cache, preparation, and the embedded shapes data set."""
