"""Objects in one image, found without labels: seven published methods on the features of one bundle."""
