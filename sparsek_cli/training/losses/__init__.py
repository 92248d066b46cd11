"""What is minimised: text and answers, distillation, and what later queries look at."""
