"""Data: webdataset shards, emoji scenes, and how a picture and its words become one training row."""
