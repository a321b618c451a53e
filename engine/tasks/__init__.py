"""What is made of descriptors: matches, masks, parts, components, similarity."""
