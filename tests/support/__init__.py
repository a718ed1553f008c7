"""What the tests share: compiling and launching without a GPU, and programs that really run at the same time."""
