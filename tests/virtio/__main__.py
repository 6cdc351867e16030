"""`make list-clauses`: the table of clauses, each with the tests that prove it, or with the reason why none does."""

from itertools import groupby

from virtio.clauses import CLAUSES, covering


def main() -> None:
    covered = covering()
    for section, clauses in groupby(CLAUSES, lambda clause: clause.section):
        print(section)
        for clause in clauses:
            print(f"  {clause.strength if clause.strength != 'text' else 'text:'} {clause.says}")
            for line in covered[clause] or [f"does not apply: {clause.not_here}"]:
                print(f"      {line}")
    apply = [clause for clause in CLAUSES if not clause.not_here]
    print(f"{len(CLAUSES)} clauses; {len(apply)} apply, {sum(bool(covered[clause]) for clause in apply)} are covered")


if __name__ == "__main__":
    main()
