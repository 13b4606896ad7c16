"""The Streamlit shell around the engine."""
