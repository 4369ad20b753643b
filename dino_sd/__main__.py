from dino_sd.cli import main

main()
