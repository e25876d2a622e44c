"""The studio: a page on which people use a loaded model and watch its tokens appear, pass by pass.

`app.py` is the page, and the only file that knows gradio besides `fields.py`; what it shows and does is made and tested without.
"""
