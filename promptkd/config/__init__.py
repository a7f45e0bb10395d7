"""Options, their parser, and the rules between them."""
