"""What balancing costs, measured."""
