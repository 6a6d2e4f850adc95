"""Tables of comparisons: cells as changes of a base recipe, run resumably, beside the numbers that papers print."""
