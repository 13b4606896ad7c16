"""What a student can learn of a teacher's inside: hidden states, attention relations, routers, experts' outputs."""
