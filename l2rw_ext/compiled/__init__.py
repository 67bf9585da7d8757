"""Steps that are traced to one graph of operations, which a backend of torch.compile compiles."""
