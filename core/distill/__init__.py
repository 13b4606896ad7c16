"""Distilling and fine-tuning: students, losses, the teacher's cached logits, the trainer; knows no recipe."""
