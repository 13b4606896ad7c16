"""Opening a model, knowing its anatomy, and counting its bytes."""
