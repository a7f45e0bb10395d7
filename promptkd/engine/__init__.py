"""DeepSpeed engines around the student and the prompted teacher."""
