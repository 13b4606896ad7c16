"""Mixture of experts: what was really routed where, what it adds up to, and how to change it."""
