import sys

from anneal_client.cli.main import main

sys.exit(main())
