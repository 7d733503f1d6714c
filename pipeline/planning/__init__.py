"""What training an expert needs, computed before any GPU is rented: memory, operations, hours, disk."""
