from flexreason.cli import main

raise SystemExit(main())
