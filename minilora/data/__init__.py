"""Records for training: files read, checked and encoded; and the data sets that come with the package."""
