"""The engine: opens, inspects, compresses, proves, evaluates and profiles models. Never draws."""
