"""What studies say: table and figures. Stands on records and config only, knows no torch."""
