"""What a model's forward does with parameters and examples."""
