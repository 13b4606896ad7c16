"""How far a student's next-token distribution is from its teacher's; one loss a file, all in nats.

Each file has ``divergence``, of two distributions over the same outcomes, and ``loss``, of a student's logits and what
its teacher said of the same positions. ``named`` finds the first by its id.
"""
