"""Commands about one set of pictures each: worlds that are drawn by a program, and photographs that people know."""
