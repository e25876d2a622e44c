"""Data: webdataset shards, and how a picture and its words become one training row."""
