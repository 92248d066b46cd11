"""Text from anywhere: files, folders, globs or a hub dataset, as one stream of documents."""
