"""The ways of asking that training in the task's second edition uses: sentences, fragments, keywords. Data only.

One a line, under the shape's name. The slots are those of `level_1.Shape`. "SUM|" or "<|" before a sentence that says
it in words of its own fixes the function or the comparison.
"""

FRAMES = """
[where_text]
Show the {column} of {table} where {text} is {value}.
{column} where {text} = '{value}'
{column} of {table} with {text} {value}
What {column} do {table} with {text} {value} have?
For {text} {value}, what is the {column}?
{text} {value}: {column}?
Give me every {column} whose {text} is {value}.
Could you list the {column} of {table} that have {text} {value}?
I need the {column} for all {table} where the {text} equals {value}.
{table} with {value} as {text}: show {column}
Which {column} belong to {text} {value}?
If the {text} is {value}, which {column} is it?
Only {text} {value}, please; print the {column}.
Filter {table} by {text} "{value}" and return {column}.
Select {column} from {table} where {text} is '{value}'.
{table}, {text}={value}, {column}
Where {text} is {value}, list the {column}.
Among {table} whose {text} is {value}, what are the {column} values?
Pull up the {column} of any {table} having {value} for {text}.
Would you please tell me the {column} when {text} is {value}?
Get {column} by {text} {value}.
{value} is the {text}. What is the {column}?
Say which {column} the {table} with the {text} {value} have.
Look up {text} {value} and give the {column}.
Retrieve {column}; condition: {text} is {value}.
I'd like to see {column} for {table} in which {text} is {value}.
The {column} of {table} matching {text} {value}
Which {table} have {text} {value}? Only the {column}.
Display the {column} column for rows with {text} {value}.
Rows with {value} in {text}: their {column}
Can I see what {column} there is for {text} = {value}?
Name the {column} of all {table} whose {text} reads {value}.
{table}: {column} if {text} is {value}
When {text} says {value}, what does {column} say?
My {table} with {text} {value}, just the {column} please
Find {table} by {text} ({value}) and print their {column}.
{value} as the {text}, {column} wanted
Show me {column}, but only where {text} matches {value}.
List out every {column} that goes along with {text} {value}.
What's the {column} of the {table} under {text} {value}?
Restrict {text} to {value} and output {column}.
Who or what has {text} {value}? Answer with the {column}.
Report the {column} for the {text} "{value}".
Go through {table}, keep {text} {value}, tell me each {column}.

[where_number]
Show the {column} of {table} where {number} is {than} {bound}.
{column} where {number} {sign} {bound}
{column} of {table} with {number} {than} {bound}
What {column} do {table} with a {number} {than} {bound} have?
For {number} {than} {bound}, what is the {column}?
{number} {sign} {bound}: {column}?
Give me every {column} whose {number} is {than} {bound}.
>|Could you list the {column} of {table} that have a {number} exceeding {bound}?
<|I need the {column} for all {table} where the {number} stays under {bound}.
>|{table} past {bound} in {number}: show {column}
<|{table} that do not reach {bound} in {number}: show {column}
Which {column} belong to a {number} {than} {bound}?
If the {number} is {than} {bound}, which {column} is it?
Only {number} {than} {bound}, please; print the {column}.
Filter {table} by {number} {sign} {bound} and return {column}.
Select {column} from {table} where {number} {sign} {bound}.
{table}, {number}{sign}{bound}, {column}
Where {number} is {than} {bound}, list the {column}.
Among {table} whose {number} is {than} {bound}, what are the {column} values?
>|Pull up the {column} of any {table} going beyond {bound} in {number}.
<|Pull up the {column} of any {table} staying short of {bound} in {number}.
Would you please tell me the {column} when {number} is {than} {bound}?
Get {column} by {number} {than} {bound}.
Say which {column} the {table} with a {number} {than} {bound} have.
Look for {number} {than} {bound} and give the {column}.
Retrieve {column}; condition: {number} {sign} {bound}.
I'd like to see {column} for {table} in which {number} is {than} {bound}.
Which {table} have {number} {than} {bound}? Only the {column}.
Display the {column} column for rows with {number} {than} {bound}.
>|Rows that rise above {bound} in {number}: their {column}
Can I see what {column} there is for {number} {sign} {bound}?
>|Name the {column} of all {table} whose {number} tops {bound}.
<|Name the {column} of all {table} whose {number} falls below {bound}.
{table}: {column} if {number} is {than} {bound}
My {table} with {number} {than} {bound}, just the {column} please
{number} {than} {bound}, {column} wanted
Show me {column}, but only where {number} comes out {than} {bound}.
List out every {column} that goes along with {number} {than} {bound}.
What's the {column} of the {table} {than} {bound} in {number}?
>|Set {bound} as the floor for {number}, nothing equal to it, and output {column}.
<|Set {bound} as the ceiling for {number}, nothing equal to it, and output {column}.
Report the {column} for a {number} {than} {bound}.
Go through {table}, keep {number} {than} {bound}, tell me each {column}.
>|In which {column} is {number} bigger than {bound}?
<|In which {column} is {number} still smaller than {bound}?

[count]
How many {table} are there?
Count all the {table}.
number of {table}
{table} count
What is the number of {table}?
count of {table}
Could you count the {table} for me?
How many rows are in {table}?
Total number of {table}?
I need the count of {table}.
{table}: how many?
How many {table} do we have in all?
Give me the number of {table}.
Return the row count of {table}.
What's the size of the {table} table?
How large is the list of {table}?
Say how many {table} exist.
How many {table} in total
Number of rows in {table}
Count all rows of {table}
Count up every one of the {table}.
{table}, number of rows
Let me know the number of {table}, please.
Would you tell me how many {table} are listed?
How many entries does {table} have?
Entries in {table}: count
Show the number of records in {table}.
Records in {table}?
How many {table} did we record?
Find out how many {table} there are.
In {table}, how many rows are there?
What count do you get for {table}?
Work out the number of {table}.
Simply count {table}
Do a count of the {table}.
How many {table} does the table hold?
Select the count from {table}.
Can you get me a head count of {table}?
All {table}, counted
how many {table}
What number of {table} is on file?
The number of {table}, please
Display how many {table} are stored.
Take {table} and count them.

[count_where]
How many {table} have {text} {value}?
Count the {table} where {text} is {value}.
number of {table} with {text} {value}
{table} count where {text} = '{value}'
What is the number of {table} whose {text} is {value}?
count {text} {value}
Could you count the {table} with {value} as {text}?
How many rows of {table} have {text} {value}?
Total number of {table} for {text} {value}?
I need the count of {table} that have {text} {value}.
{text} {value}: how many {table}?
With {text} {value}, how many {table} do we have?
Give me the number of {table} where {text} equals {value}.
Return the row count for {text}='{value}'.
For {text} {value}, count the {table}.
How often is {text} {value}?
How often does {value} occur in {text}?
Say how many {table} have {value} for {text}.
How many of the {table} show {text} {value}
Number of rows where {text} is {value}
Count all rows with {text} {value}
{table}, {text} "{value}", number of rows
Let me know the number of {table} under {text} {value}, please.
Would you tell me how many {table} come with {text} {value}?
How many entries in {table} carry {text} {value}?
Entries with {text} {value}: count
If {text} is {value}, how many {table} are there?
Filter {text} by {value} and count.
Where {text} is {value}, how many rows are there?
Among {table}, how many have the {text} {value}?
How many times is {text} equal to {value}?
Only {text} {value}: number of {table}
Find out how many {table} are in {text} {value}.
What count do you get for {text} = {value}?
Work out the number of {table} having {text} {value}.
Just count {table} with {text} {value}
Count {table} by {text} {value}
Restrict {table} to {text} {value}; how many are left?
Select the count from {table} where {text} is {value}.
Can you see how many {table} match {text} {value}?
{value} in {text}, how many?
how many {table}, {text} {value}
What number of {table} has {text} {value}?
Of all {table}, how many list {value} as the {text}?

[aggregate]
What is the {stat} {number} of {table}?
Show the {stat} {number} of all {table}.
{stat} {number}
{stat} {number} of {table}
{table}: {stat} {number}
Compute the {stat} {number} for {table}.
Give me the {stat} {number}.
Could you work out the {stat} {number} of the {table}?
I need the {stat} {number} across {table}.
{number} of {table}: {stat}?
For {table}, what is the {stat} {number}?
In {table}, what's the {stat} {number}?
Return the {stat} {number} from {table}.
Looking at {number}, what is the {stat} value?
Say what the {stat} {number} in {table} is.
What {stat} {number} do the {table} have?
{stat} {number} over every row
{number}, {stat}
Find the {stat} {number} in {table}.
Can you give the {stat} {number} of our {table}?
Let me see the {stat} {number}, please.
Would you calculate the {stat} {number} for all {table}?
Take {number} in {table} and report the {stat}.
Select the {stat} {number} from {table}.
Which is the {stat} {number} among {table}?
{stat} value of {number} in {table}
Display the {stat} {number}.
Just the {stat} {number} please
SUM|Add up the {number} of all {table}.
SUM|How much {number} is there in all?
SUM|How much {number} do {table} have together?
SUM|{number} of all {table} put together
AVG|On average, what is the {number} of {table}?
AVG|{table}: {number} on average
AVG|Average out {number} over {table}.
MAX|How far up does {number} reach in {table}?
MAX|What is the most that {number} reaches?
MAX|The upper end of {number} in {table}
MIN|How far down does {number} reach in {table}?
MIN|What is the least that {number} gets to?
MIN|The lower end of {number} in {table}
{func}({number}) in {table}
{func} of {number}
{func} {number} {table}
I would like {func} of {number} for {table}.

[group]
What is the {stat} {number} per {text}?
Show the {stat} {number} of {table} for each {text}.
{stat} {number} by {text}
{stat} {number} per {text}
{table}: {stat} {number} by {text}
Compute the {stat} {number} for every {text}.
For each {text}, give me the {stat} {number}.
Could you work out the {stat} {number} of {table} per {text}?
I need the {stat} {number} broken down by {text}.
{text} and {stat} {number}
For every {text}, what is the {stat} {number}?
By {text}: {stat} {number}
Per {text}, {stat} {number} of {table}
Return each {text} with its {stat} {number}.
Group {table} by {text} and take the {stat} {number}.
Say what the {stat} {number} is in every {text}.
What {stat} {number} does each {text} have?
{stat} {number}, grouped by {text}
{number} per {text}, {stat}
List every {text} together with the {stat} {number}.
Can you split the {stat} {number} by {text}?
Let me see the {stat} {number} of each {text}, please.
Would you calculate the {stat} {number} separately for each {text}?
Take each {text} of {table} and report the {stat} {number}.
Select {text} and the {stat} {number} from {table}.
Within each {text}, which {number} is the {stat}?
One row per {text}: {stat} {number}
Display {text} with {stat} {number}.
How does the {stat} {number} look by {text}?
Break {table} down by {text}, {stat} {number} for each.
Across {text}, compare the {stat} {number}.
Give {stat} {number} for each of the {text} values.
Each {text}: {stat} {number}?
Which {stat} {number} goes with which {text}?
SUM|Add up {number} for each {text}.
SUM|How much {number} does each {text} have in all?
SUM|{number} of every {text} put together
AVG|On average, what is the {number} in each {text}?
AVG|{number} on average by {text}
MAX|How far up does {number} reach in each {text}?
MIN|How far down does {number} reach in each {text}?
{func}({number}) by {text}
{text}, {func}({number})
{func} of {number} for each {text}
I would like {func} {number} per {text} in {table}.

[top]
Show the {column} of the {limit} {table} with the highest {number}.
top {limit} {column} by {number}
{column} of the top {limit} {table} by {number}
Which {column} have the {limit} highest {number}?
What are the {limit} {column} with the largest {number}?
first {limit} {column} by {number}, highest first
Give me the {column} for the {limit} biggest {number}.
Could you list the {column} of the {limit} {table} with the most {number}?
I need the {column} of {limit} {table}, those with the greatest {number}.
{limit} {table} with the largest {number}: {column}
{limit} highest {number}: {column}?
Sort {table} by {number} from high to low and give the first {limit} {column}.
Order by {number} descending, {limit} rows, {column}
By {number}, which {limit} {table} come first? Show the {column}.
Rank {table} by {number}, then name the {column} of the top {limit}.
Return {column} for the top {limit} in {number}.
Say which {column} the {limit} {table} leading in {number} have.
{table}, highest {number} first, {limit} {column}
Best {limit} {table} by {number}, just the {column}
The {limit} {table} that have the most {number}: print their {column}.
Among {table}, take the {limit} with the highest {number} and list {column}.
For the {limit} largest {number}, what is the {column}?
Can I see the {column} of the {limit} {table} at the top in {number}?
Would you please tell me {column} for the {limit} maximum {number}?
Pick the {limit} {table} whose {number} is highest; show {column}.
Select {column} from {table}, largest {number} first, limit {limit}.
Who or what are the {limit} leaders in {number}? Answer with the {column}.
List {limit} {column} in falling order of {number}.
Get the top {limit} of {table} by {number}, {column} only.
{column}, {limit} greatest {number}
Starting with the largest {number}, name {limit} {column}.
Find the {limit} {table} ranking highest on {number} and report {column}.
What {column} do the {limit} {table} with top {number} have?
Highest {number}: {limit} {column} please
Display the {column} of {limit} {table}, the ones biggest in {number}.
In order of {number}, largest first, show {limit} {column}.
Only the {limit} highest by {number}; {column} wanted
Go down the list of {table} by {number} and stop after {limit}: which {column}?
The {column} column for the {limit} rows with the most {number}
I'd like {limit} {column}, picked by largest {number}.
Top {limit} for {number} among {table}: {column}
Limit to {limit}, sort on {number} descending, print {column}.
Which {limit} {table} have the highest {number}? Give their {column}.
Name {limit} {column} having the greatest {number}.
What is {column} in the {limit} {table} that score highest on {number}?

[distinct]
What are the distinct {text} of {table}?
List the different {text} in {table}.
unique {text}
distinct {text}
distinct {text} of {table}
{table}: unique {text}
Which different {text} do the {table} have?
Give me all unique {text}.
Could you list each {text} in {table} once?
I need every different {text}.
{text} without duplicates
{text} values in {table}, no repeats
What {text} are there?
What {text} occur in {table}?
Which {text} exist in {table}?
Show every {text} only once.
Return the set of {text} from {table}.
All {text} in {table}, each once
Say which {text} appear among the {table}.
Find the distinct values of {text}.
Can you tell me what {text} the {table} come in?
Let me see the different {text}, please.
Would you name all the {text} found in {table}?
Select distinct {text} from {table}.
Drop repeats and list {text}.
Display the {text} of {table} without repetition.
How is {text} spread: which values does it take?
Different {text} of {table}
each unique {text}
Which values can be seen in {text}?
What possible {text} do {table} show?
The list of {text} in {table}, duplicates removed
One line for each {text} in {table}
For {table}, which {text} are in use?
Across all {table}, which {text} do we meet?
Every {text}, but no {text} twice
Just the unique {text} please
Collect the {text} that {table} have, each of them once.
Report the different values in the {text} column.
Go through {table} and note each new {text}.
{text}: all different values
In {table}, what kinds of {text} are there?
Tell me each separate {text}.
Get {text}, distinct only.
"""
