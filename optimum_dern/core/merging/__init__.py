"""What methods that merge groups of experts share: compare, group, align, average."""
