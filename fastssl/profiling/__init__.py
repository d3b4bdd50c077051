"""What a step costs and needs: counted, modelled, and set beside what machines can do."""
