"""`dino-sd report`: what is in the folders of runs, on one page that can be sent around."""
