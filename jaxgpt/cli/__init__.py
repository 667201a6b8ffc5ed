"""The commands of `jaxgpt`: a module for each, and what they share."""
