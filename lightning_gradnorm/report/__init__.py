"""What a person looks at: tags, TensorBoard's charts, the table and the weights file at the end of fit."""
