"""What a run tells: its folder, metrics while it goes on, the report at its end, both read again.

May import config, placement, files and launch.console. Is given plain data; knows neither trainer
nor model, needs no torch.

    while it goes on  run_log (progress, TensorBoard), metrics (metrics.jsonl), tally (counts), runs
                      (run folders), units
    the report        report, of tables: spent (time and bytes), course (loss), story (sites lost)
    as a page         page (page.jinja), plots, svg
    read again        command (fomoe report), stored, compare, measured (loads, for other jobs)
"""
