"""Models and data sets from Hugging Face and ModelScope: named, listed, downloaded, checked, found again offline."""
