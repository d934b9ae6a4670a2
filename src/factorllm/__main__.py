from factorllm.cli import main

main()
